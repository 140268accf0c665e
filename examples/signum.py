"""An optimizer of one's own: the sign of a momentum, in three lines.

Race it against the built-in ones, on the built-in task or on your own:

    gradstep race --optimizers examples/signum.py:Signum,lion,adamw
    gradstep race examples/my_task.py:task --optimizers examples/signum.py:Signum,sgd
"""

import gradstep as gs


@gs.rule
def Signum(w, g, m, *, learning_rate, momentum=0.9, weight_decay=0.0):
    m = momentum * m + (1 - momentum) * g
    return w - learning_rate * (gs.sign(m) + weight_decay * w), m
