"""The parts of gpu_check.py: agreement with a CPU, memory, times of products, throughput of training, the page."""
