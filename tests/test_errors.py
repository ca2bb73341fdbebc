"""Which of torch's errors tell of the machine: its memory, and where its tensors are."""

import pytest
import torch
from torch import nn

from gm_probe.errors import (
    DataError,
    DeviceError,
    ProbeError,
    foreign_or,
    of_machine,
    on_two_devices,
    one_device,
    out_of_memory,
)

MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "XPU out of memory. Tried to allocate 20.00 GiB",
    "NPU out of memory. Tried to allocate 20.00 MiB",
    "MPS backend out of memory (MPS allocated: 18.10 GB, max allowed: 18.13 GB)",
    "Invalid buffer size: 24.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "CUDA driver error: out of memory",
    "cudaErrorMemoryAllocation: out of memory",
    "hipErrorOutOfMemory",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "Native API failed. Native API returns: -6 (PI_ERROR_OUT_OF_HOST_MEMORY)",
    "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "unable to mmap 4096 bytes from file </torch_1>: Cannot allocate memory (12)",
    "std::bad_alloc",
    "bad allocation",
]
DEVICES = [
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "Expected all tensors to be on the same device, but got mat1 is on cpu, different from other tensors on cuda:0",
    "Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be the same",
    "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same or input should be a "
    "MKLDNN tensor and weight is a dense tensor",
    "Input type (c10::BFloat16) and bias type (torch.cuda.FloatTensor) should be the same",
    "Tensor for argument #2 'mat1' is on CPU, but expected it to be on GPU (while checking arguments for addmm)",
    "Tensor for 'out' is on CPU, Tensor for argument #1 'self' is on CPU, but expected them to be on GPU",
    "indices should be either on cpu or on the same device as the indexed tensor (cpu)",
    "Input and parameter tensors are not at the same device, found input tensor at cpu and parameter tensor at cuda:0",
    "Expected a 'cuda' device type for generator but found 'cpu'",
    "Expected object of device type cuda but got device type cpu for argument #1 'self' in call to _th_index_select",
    "Placeholder storage has not been allocated on MPS device!",
]
OF_THE_MODEL = [
    "mat1 and mat2 shapes cannot be multiplied (4x3 and 5x2)",
    "Input type (double) and bias type (float) should be the same",
    "Input type (torch.cuda.HalfTensor) and weight type (torch.cuda.FloatTensor) should be the same",
    "Input type (torch.DoubleTensor) and weight type (torch.FloatTensor) should be the same",
    "Trying to backward through the graph a second time",
    "CUDA error: device-side assert triggered",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`",
    "expected scalar type Float but found Double",
    "the derivative for '_cudnn_rnn_backward' is not implemented",
    "out of resource: shared memory, Required: 147456, Hardware limit: 101376",
]


@pytest.mark.parametrize("text", MEMORY)
def test_memory_that_ran_out_is_told_in_many_words(text: str) -> None:
    assert out_of_memory(RuntimeError(text))
    assert of_machine(RuntimeError(text))
    assert not on_two_devices(RuntimeError(text))


@pytest.mark.parametrize("text", DEVICES)
def test_two_devices_are_told_in_many_words(text: str) -> None:
    assert on_two_devices(RuntimeError(text))
    assert of_machine(RuntimeError(text))
    assert not out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", OF_THE_MODEL)
def test_the_models_own_errors_are_neither(text: str) -> None:
    assert not of_machine(RuntimeError(text))


def test_torch_says_so_itself() -> None:
    assert out_of_memory(torch.OutOfMemoryError("whatever the driver says: out of memory"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert out_of_memory(raised.value)
    assert out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as raised:
        nn.Conv2d(1, 1, 1)(torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    assert not of_machine(raised.value)  # two dtypes, one device
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2, device="meta") + torch.zeros(2)
    assert on_two_devices(raised.value)


def test_two_devices_are_no_fault_of_a_strangers_code() -> None:
    def blamed(cause: str) -> ProbeError:
        return DataError(f"the examples are to blame: {cause}")

    with pytest.raises(DeviceError, match=r"two devices .* found at least two devices"), foreign_or(blamed):
        raise RuntimeError(DEVICES[0])
    with pytest.raises(RuntimeError, match="out of memory"), foreign_or(blamed):
        raise RuntimeError(MEMORY[0])
    with pytest.raises(DataError, match="to blame"), foreign_or(blamed):
        raise RuntimeError(OF_THE_MODEL[0])
    with pytest.raises(RuntimeError, match="shapes"), one_device():
        raise RuntimeError(OF_THE_MODEL[0])
    assert DeviceError.exit_code == 2
