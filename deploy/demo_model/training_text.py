"""The text of a run: its documents in random order, as ids, dealt to the rows of a batch."""

import ast
import ctypes
import os

import torch

PARTS = ("books", "reference", "chat", "drill")


def read_vocabulary(path):
    """Token bytes in id order from 1."""
    tokens = []
    with open(path, "rb") as f:
        for line in f.read().decode("utf-8").split("\n"):
            if line:
                first, last = line.index(" "), line.rindex(" ")
                value = ast.literal_eval(line[first + 1:last])
                tokens.append(value.encode("utf-8") if isinstance(value, str) else value)
                assert int(line[:first]) == len(tokens) and int(line[last + 1:]) == len(tokens[-1]), line
    return tokens


def tokenize(data, tokens, native):
    """Bytes -> ids by greedy longest match; a zero byte is document end, id 0."""
    if native is not None:
        ids = torch.empty(len(data), dtype=torch.uint16)
        begin = torch.tensor([0] + [len(t) for t in tokens]).cumsum(0)
        native.tokenize.restype = ctypes.c_int64
        count = native.tokenize(ctypes.c_int64(len(data)), data, ctypes.c_int64(len(tokens)), b"".join(tokens),
                                ctypes.c_void_p(begin.data_ptr()), ctypes.c_void_p(ids.data_ptr()))
        return ids[:count].clone()
    index = {t: i for i, t in enumerate(tokens, 1)}
    longest, ids, at = max(map(len, tokens)), [], 0
    while at < len(data):
        for size in range(longest, 0, -1):
            piece = data[at:at + size]
            if piece in index and (size == 1 or b"\0" not in piece):
                ids.append(0 if piece == b"\0" else index[piece])
                at += len(piece)
                break
    return torch.tensor(ids, dtype=torch.int32).to(torch.uint16)


def training_text(folder, generator, take):
    """All training documents in random order, each after a zero byte. take: {part: bytes} makes do with random passages
    of a part."""
    documents = []
    for part in PARTS:
        path = os.path.join(folder, part + ".train.txt")
        if not os.path.exists(path):
            continue
        with open(path, "rb") as f:
            data = f.read()
        if part not in take:
            documents += data.split(b"\0")
            continue
        size = 16384
        for begin in torch.randint(0, max(1,
                                          len(data) - 2 * size), (take[part] // size,), generator=generator).tolist():
            first = data.find(b"\n\n", begin) + 2
            documents += data[first:data.rfind(b"\n\n", first, first + size) + 2].split(b"\0")
    order = torch.randperm(len(documents), generator=generator).tolist()
    return b"".join(b"\0" + documents[i] for i in order)


class Segments:
    """Deals pieces of `windows` windows to the rows of a batch, each piece once an epoch, in random order."""

    def __init__(self, stream, rows, context, windows, seed):
        self.stream, self.rows, self.context, self.windows, self.seed = stream, rows, context, windows, seed
        self.size = context * windows
        self.stream = stream.to(torch.int32)
        starts = torch.arange(0, max(1, len(stream) - self.size), self.size)
        # A piece that can start with a document does: at most a quarter of a piece is read twice for that.
        ends = (self.stream == 0).nonzero().squeeze(-1)
        if len(ends):
            near = ends[torch.searchsorted(ends, starts, right=True).sub(1).clamp(min=0)]
            starts = torch.where((near <= starts) & (starts - near < self.size // 4), near, starts)
        self.starts = starts

    def batch(self, step):
        """inputs, targets [B, T] and which rows start a piece; a function of the step alone, so that a run can
        resume."""
        rows, pieces, restart = [], [], []
        for row in range(self.rows):
            at = step + row * self.windows // self.rows  # rows change their piece at different steps
            number = (at // self.windows) * self.rows + row
            epoch, within = divmod(number, len(self.starts))
            window = at % self.windows
            begin = self.starts[self.order(epoch)[within]].item() + window * self.context
            piece = self.stream[begin:begin + self.context + 1].long()
            first = window == 0 or step == 0
            restart.append(first)
            inputs, targets = piece[:-1].clone(), piece[1:]
            if first and number % 2 == 0:
                inputs[0] = 0  # half of the pieces begin with document end, as prompts and scored texts do
            rows.append(inputs)
            pieces.append(targets)
        return torch.stack(rows), torch.stack(pieces), torch.tensor(restart)

    def order(self, epoch):
        if getattr(self, "order_epoch", None) != epoch:
            self.order_epoch = epoch
            self.order_now = torch.randperm(len(self.starts),
                                            generator=torch.Generator().manual_seed(self.seed + 1000 + epoch))
        return self.order_now
