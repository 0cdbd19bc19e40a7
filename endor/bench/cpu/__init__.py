"""CPU kernels and reads, beside what the machine can do and beside other people's code."""
