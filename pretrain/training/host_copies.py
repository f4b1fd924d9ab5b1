"""Copies of a run's state in host memory, from which a checkpoint is written while training continues."""

import copy
from typing import Any

import torch


class HostCopies:
    """Copies values into buffers that are kept from one save to the next: on CUDA in pinned memory, beside what the GPU computes.

    The copies of one save are valid until the next one begins. Whatever changes the originals waits for `before_change`, and whatever reads the
    copies for `wait`.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done = torch.cuda.Event() if self._stream else None
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """Give the buffers of the last save to a new one."""
        del self._buffers[self._used :]
        self._used = 0
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, value: Any) -> Any:
        """Return a copy of nested dictionaries, lists and tuples of tensors; a tensor that occurs several times is copied once."""
        copied = self._copy(value, {})
        if self._stream and self._done:
            self._done.record(self._stream)
        return copied

    def before_change(self) -> None:
        """Let what the GPU does from here on wait until the copies have been made."""
        if self._done:
            torch.cuda.current_stream().wait_event(self._done)

    def wait(self) -> None:
        """Return when the copies have been made. May be called in another thread."""
        if self._done:
            self._done.synchronize()

    def _copy(self, value: Any, seen: dict[int, torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in seen:
                seen[id(value)] = self._copy_tensor(value.detach())
            return seen[id(value)]
        if isinstance(value, dict):
            copied = copy.copy(value)  # of its kind
            copied.update((key, self._copy(entry, seen)) for key, entry in value.items())
            return copied
        if type(value) in (list, tuple):
            return type(value)(self._copy(entry, seen) for entry in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffer(tensor)
        if self._stream and tensor.is_cuda:
            with torch.cuda.stream(self._stream):
                buffer.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)  # DeepSpeed may free it before it is copied
        else:
            buffer.copy_(tensor)
        return buffer

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the next buffer, which fits as a rule: the saves of a run have the same tensors in the same order."""
        place, self._used = self._used, self._used + 1
        if place == len(self._buffers):
            self._buffers.append(torch.empty(0))
        kept = self._buffers[place]
        if kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._buffers[place] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None
            )
        return kept
