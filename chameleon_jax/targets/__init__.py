"""What a program needs and how fast it can be on hardware that is not here.

The programs of a stream and the steps of training are compiled ahead of time, from shapes alone,
by the compilers of the chips themselves: `libtpu` for TPUs, the CUDA plugin of JAX for NVIDIA. No
weights, no accelerator.

    machines   which chips, how many of them, what they have
    programs   from a config to traced programs on such chips
    hlo        what a compiled program holds: kernels, collectives, copies
    compiling  one program compiled, as a report; in a process of its own
    report     reports together: tables, files
"""
