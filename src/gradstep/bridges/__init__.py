"""Bridges between the states of other libraries' optimizers and those of gradstep's core."""
