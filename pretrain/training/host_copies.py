"""Copies of a run's state in host memory, from which a checkpoint is written while training continues."""

import copy
from typing import Any

import torch


class HostCopies:
    """Copies of nested values in host buffers. Each save reuses the buffers of the previous save.

    On CUDA the buffers are in pinned memory, and copying overlaps with the computation. The copies of one save are
    valid until the next save begins. Call `before_change` before changing the originals, and `wait` before reading the
    copies.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done = torch.cuda.Event() if self._stream else None
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """Begin a new save, which reuses the buffers of the last one."""
        del self._buffers[self._used :]
        self._used = 0
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, value: Any) -> Any:
        """Return a copy of nested dictionaries, lists and tuples of tensors. A repeated tensor is copied once."""
        copied = self._copy(value, {})
        if self._stream and self._done:
            self._done.record(self._stream)
        return copied

    def before_change(self) -> None:
        """Make later GPU work wait until the copies are complete."""
        if self._done:
            torch.cuda.current_stream().wait_event(self._done)

    def wait(self) -> None:
        """Block until the copies are complete. May be called on another thread."""
        if self._done:
            self._done.synchronize()

    def _copy(self, value: Any, seen: dict[int, torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in seen:
                seen[id(value)] = self._copy_tensor(value.detach())
            return seen[id(value)]
        if isinstance(value, dict):
            copied = copy.copy(value)  # keeps the type of dictionary
            copied.update((key, self._copy(entry, seen)) for key, entry in value.items())
            return copied
        if type(value) in (list, tuple):
            return type(value)(self._copy(entry, seen) for entry in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > 1 and not any(tensor.stride()):  # one value, repeated without memory
            return self._copy_tensor(tensor[(0,) * tensor.ndim]).expand(tensor.shape)
        buffer = self._buffer(tensor)
        if self._stream and tensor.is_cuda:
            with torch.cuda.stream(self._stream):
                buffer.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)  # DeepSpeed may free the tensor before it is copied
        else:
            buffer.copy_(tensor)
        return buffer

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the next buffer, replaced if it does not fit.

        A buffer usually fits, because all saves of a run have the same tensors in the same order.
        """
        index, self._used = self._used, self._used + 1
        if index == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[index]
        if buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[index] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None
            )
        return buffer
