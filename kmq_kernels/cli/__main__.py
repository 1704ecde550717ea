"""For torchrun, which starts modules: torchrun -m kmq_kernels.cli quantize ..."""

from .app import main

main()
