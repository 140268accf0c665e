"""`gradstep bench`: time the optimizer step on this machine, against the limit of its memory and against peers."""

ROUNDS = 15
SIZES = "1e3,1e4,1e5,1e6,1e7,2e7"
QUICK_ROUNDS = 5
QUICK_SIZES = "1e4,1e6"
