"""Checkpoints: the whole of an optimizer as plain data and tensors, in files or in memory.

What a checkpoint is:  nodes      the plain data: a tree of optimizers, with the keys of their tensors
                       values     hyperparameters as plain data, and back
                       snapshot   an optimizer as such data and its live arrays; state dicts
Files:                 container  the safetensors format
                       files      replaced whole: written beside, synced, renamed
                       sharded_file  an index of shards, which are containers
                       shards     the files of shards: written, held, removed
                       checkpoint_file  one checkpoint by its path; `gs.load`, `gs.latest`
Loading:               making     a new optimizer, as the data say
                       matching   the data's tree against an optimizer's
                       wants      what parameters need of state, and how it is to lie
                       tensors    where arrays are read from
                       comparison  what fits of them
                       differences  what does not, as it is told
                       restore    all of it in order, and then the change
"""
