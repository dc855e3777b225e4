"""What XLA makes of every clip for a GPU and a TPU, which need not be there.

JAX compiles for a device that is not there. What comes out is read as text: how many bytes pass
through the device's memory, how many kernels run, whether anything is conditional, what devices say
to each other, how much memory is temporary, how long it took to compile, and on a TPU how many
cycles the compiler expects. Seconds cannot be read.

passes: Bytes read and written, in multiples of the gradient's. The least for SGD is 3.
kernels: Instructions of the main computation that compute or move something, copies of scalars
    too. What a conditional chooses between is counted as the cheaper branch: the other is for norms
    out of range.
"""
