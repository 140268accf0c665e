"""`gradstep race`: train one task with many optimizers and rates, and rank them."""

SEEDS = 3
STEPS = 800
