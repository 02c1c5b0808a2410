"""Everything that differs when SGLang runs on a CPU. None of it is active on a GPU.

settings   The arguments and the environment of such a server.
stand_ins  Modules in place of torchvision and sgl_kernel, which a CPU environment cannot have.
plugin     Seven changes of SGLang, each with its reason, its place upstream and its versions:
           seeds, batch invariance, the hash, decode attention, shared memory, broadcasts, memory
           that is given back.
kernels    The torch code of batch invariance and decode attention.
murmur_hash
           The torch code of the hash.
incoming   The code of the broadcasts.
memory     The code of the memory that is given back.
workers    A faster start: forked workers, one model file.

Each change first looks whether upstream is still as described. If it is not, a change that decides
a result ends the server with a plain message, and one that only saves time is left out.
"""
