#!/usr/bin/env python3
"""Writes the files of this folder with the real writers: PyTorch's torch.save and Hugging Face's safetensors.

  pip install torch==2.15.0 safetensors==0.8.0 && ./make_testdata.py

Element n (row-major) of the tensor with number t is t + n / 8: exact in every type used.
"""
import collections
import os
import zipfile

import safetensors.torch
import torch

HERE = os.path.dirname(os.path.abspath(__file__))


def numbers(t, *shape, dtype=torch.float32):
    n = 1
    for size in shape:
        n *= size
    return (t + torch.arange(n, dtype=torch.float64) / 8).reshape(shape).to(dtype)


class Small(torch.nn.Module):
    """Its state_dict carries _metadata, as every saved module's does."""

    def __init__(self):
        super().__init__()
        self.bf16 = torch.nn.Parameter(numbers(1, 1, 1, 5, dtype=torch.bfloat16))
        self.fp16 = torch.nn.Parameter(numbers(2, 3, 2, dtype=torch.float16))
        self.register_buffer("int64", torch.arange(4))
        self.transposed = torch.nn.Parameter(numbers(3, 4, 3).t().contiguous().t())
        whole = numbers(4, 6, 2)
        self.register_buffer("rows_0_to_4", whole[:4])
        self.register_buffer("column_1", whole[:, 1])
        self.register_buffer("scalar", torch.tensor(5.0))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("unit_strides", numbers(6, 7).as_strided((1, 7, 1), (3, 1, 99)))


def main():
    state = Small().state_dict()
    torch.save(state, os.path.join(HERE, "torch_zip.pth"))
    # As other zip programs pack it again.
    with zipfile.ZipFile(os.path.join(HERE, "torch_zip.pth")) as stored, \
         zipfile.ZipFile(os.path.join(HERE, "torch_deflated.pth"), "w") as deflated:
        for member in stored.infolist():
            deflated.writestr(zipfile.ZipInfo(member.filename), stored.read(member), zipfile.ZIP_DEFLATED)
    torch.save(state, os.path.join(HERE, "torch_legacy.pth"), _use_new_zipfile_serialization=False)
    nested = collections.OrderedDict(("_forward_module." + k, v) for k, v in state.items())
    torch.save({"epoch": 3, "state_dict": nested, "note": "trainer's own", "done": None},
               os.path.join(HERE, "torch_nested.pth"))
    torch.save({"parameter": torch.nn.Parameter(numbers(1, 2, 2))}, os.path.join(HERE, "torch_parameter.pth"))
    torch.save({"module": torch.nn.Linear(2, 2)}, os.path.join(HERE, "torch_code.pth"))
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in state.items()},
                                os.path.join(HERE, "safetensors.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
