"""The machine: devices, precision, random generators, processes of torchrun, signals."""
