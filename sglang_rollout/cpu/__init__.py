"""Everything that differs when SGLang runs on a CPU; none of it is active on a GPU.

settings   arguments and environment of such a server
stand_ins  modules in place of torchvision and sgl_kernel, which a CPU environment cannot have
plugin     six changes: seeds, batch invariance, the hash, decode attention, shared memory, broadcasts; each with its reason, upstream place and version range
kernels    the torch code behind the last three
workers    faster start: forked workers, one model file

Each change first looks whether upstream is still as described and ends the server with a plain
message where it is not.
"""
