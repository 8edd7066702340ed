#!/usr/bin/env python3
"""Tests of the demo model that need PyTorch: the recurrence in its three forms, and a few training steps on tiny text.

Without PyTorch, or with one that is too old, it says so and is skipped."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
try:
    import torch
    if not hasattr(torch, "uint16"):
        raise ImportError(f"PyTorch {torch.__version__} is too old, 2.3 is needed")
    import optimisers
    import rwkv7
    import wkv7
except ImportError as error:
    print(f"train_test: skipped, no PyTorch here: {error}")
    if "XML_OUTPUT_FILE" in os.environ:  # Bazel's word for it.
        with open(os.environ["XML_OUTPUT_FILE"], "w", encoding="utf-8") as report:
            report.write(
                '<testsuites><testsuite name="train_test"><testcase name="train_test"><skipped/></testcase></testsuite></testsuites>'
            )
    sys.exit(0)

VOCABULARY = os.path.join(HERE, "rwkv7_demo.vocab.txt")


def inputs(dtype, batch=2, tokens=32, heads=2):
    """Random r, logw, k, v, a, b, state; decays from the slowest to the fastest that RWKV-7 allows."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, tokens, heads, 64)
    kappa = torch.nn.functional.normalize(normal(*shape), dim=-1)
    values = (normal(*shape), -0.60653066 * torch.sigmoid(3 * normal(*shape)), 0.3 * normal(*shape), normal(*shape),
              -kappa, kappa * torch.sigmoid(normal(*shape)), normal(batch, heads, 64, 64))
    return [x.to(dtype).requires_grad_() for x in values]


def results(function, dtype):
    """Output, final state and the gradients of r..b for a fixed weighting of the output."""
    arguments = inputs(dtype)
    y, state = function(*arguments)
    (y * torch.sin(torch.arange(y.numel(), dtype=dtype)).view(y.shape)).sum().backward()
    return [y.detach().double(), state.detach().double()] + [x.grad.double() for x in arguments[:6]]


class RecurrenceTest(unittest.TestCase):

    def compare(self, function, dtype, tolerance):
        for i, (expected,
                actual) in enumerate(zip(results(wkv7.wkv7_recurrent, torch.float64), results(function, dtype))):
            error = ((expected - actual).abs().max() / expected.abs().max()).item()
            self.assertTrue(error <= tolerance, f"result {i}: relative error {error} beyond {tolerance}")

    def test_chunked_equals_plain_recurrence_in_float64(self):
        self.compare(wkv7.wkv7_chunked, torch.float64, 1e-13)

    def test_chunked_in_float32_stays_within_rounding(self):
        self.compare(wkv7.wkv7_chunked, torch.float32, 5e-6)

    def test_native_equals_plain_recurrence(self):
        with tempfile.TemporaryDirectory() as folder:
            wkv7.NativeWkv7.library = wkv7.load_native(folder)
            if wkv7.NativeWkv7.library is None:
                self.skipTest("no C++ compiler here")
            self.compare(wkv7.NativeWkv7.apply, torch.float32, 5e-6)


class ModelTest(unittest.TestCase):

    def setUp(self):
        self.model = rwkv7.Model(rwkv7.initial_weights(2, 128, 300, torch.Generator().manual_seed(3)))

    def test_split_window_equals_whole_window(self):
        rwkv7.COMPUTE, kept = torch.float32, rwkv7.COMPUTE
        try:
            with torch.no_grad():
                for tensor in self.model.tensors:  # so that no path is multiplied by a starting zero
                    tensor += 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
            ids = torch.randint(0, 300, (2, 65), generator=torch.Generator().manual_seed(4))
            zero = self.model.zero_state(2)
            whole = self.model(ids[:, :-1], ids[:, 1:], zero)[1]
            _, first, state = self.model(ids[:, :32], ids[:, 1:33], zero)
            second = self.model(ids[:, 32:64], ids[:, 33:65], state)[1]
            self.assertLess((torch.cat([first, second], 1) - whole).abs().max().item(), 1e-4)
        finally:
            rwkv7.COMPUTE = kept

    def test_only_matrices_decay_and_muon_has_those_of_the_blocks(self):
        names = {id(t): n for n, t in self.model.weights().items()}
        options = argparse.Namespace(rate=1e-3, muon_rate=0.01, decay=0.1)
        groups = [(g["weight_decay"], [names[id(t)]
                                       for t in g["params"]])
                  for o in optimisers.optimisers(self.model, options)
                  for g in o.param_groups]
        (inner_decay, inner), (outer_decay, outer), (w0_decay, w0), (rest_decay, rest) = groups
        self.assertEqual((inner_decay, outer_decay, w0_decay, rest_decay), (0.1, 0.1, 0.0, 0.0))
        self.assertEqual(len(inner), 2 * 6)
        self.assertEqual(outer, ["emb.weight", "head.weight"])
        self.assertEqual(w0, ["blocks.0.att.w0", "blocks.1.att.w0"])
        self.assertIn("blocks.1.att.w2", rest)
        self.assertEqual(sum(len(n) for _, n in groups), len(names))

    def test_muon_takes_an_orthogonal_step(self):
        for shape in ((64, 64), (256, 64), (64, 256)):
            step = optimisers.Muon.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(5)))
            values = torch.linalg.svdvals(step)
            self.assertGreater(values.min().item(), 0.3)
            self.assertLess(values.max().item(), 1.4)


class RunTest(unittest.TestCase):

    def test_a_few_steps_lower_the_loss_resume_and_export(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "books.train.txt"), "wb") as f:
                f.write(b"\0".join(b"The cat sat on the mat, and the dog looked at the cat. " * 60 for _ in range(8)))
            run, model = os.path.join(folder, "run"), os.path.join(folder, "model.safetensors")
            command = [
                sys.executable, "-B",
                os.path.join(HERE, "train.py"), "--text", folder, "--vocabulary", VOCABULARY, "--run", run, "--layers",
                "2", "--width", "64", "--rows", "2", "--context", "32", "--segment", "2", "--warmup", "5", "--compile",
                "off", "--native", "off", "--log-steps", "4", "--export", model
            ]
            subprocess.run(command + ["--steps", "8"], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(command + ["--steps", "20"], check=True, stdout=subprocess.DEVNULL)
            with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as f:
                rows = [json.loads(line) for line in f]
            self.assertEqual([row["step"] for row in rows], [4, 8, 12, 16, 20])
            self.assertLess(rows[-1]["loss"], rows[0]["loss"] - 1)
            self.assertGreater(os.path.getsize(model), 2 * 64 * 4096 * 2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
