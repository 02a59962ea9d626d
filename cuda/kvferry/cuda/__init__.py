"""The CUDA staging path: engine pages to arena slots and back, through the GPU's own copy engines and small kernels.

Importing it needs no GPU and none of NVIDIA's packages; they are imported when a device is opened or a kernel is
compiled. ``DESIGN.md`` beside this file says why it is built this way.
"""
