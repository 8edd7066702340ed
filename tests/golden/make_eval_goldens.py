#!/usr/bin/env python3
"""Makes eval.json beside it: what `rwkvctl eval` and `rwkvctl embed` have to say of the demo model, computed by its
evaluate.py (numpy, shares nothing with the cluster). Numbers are sums in float64 over float32 logits.

    python3 tests/golden/make_eval_goldens.py
"""

import json
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
DEMO = os.path.join(HERE, "../../deploy/demo_model")

PASSAGE = """The boat came into the harbor at night. An old man stood on the quay with a lantern in his hand, and when he saw us he called out that there was soup on the fire and a bed for each of us.
We were glad of it, for the wind had been cold all day. In the morning the sea was quiet. My brother went down to the boat and looked at the sail, and the old man went with him.
"It will not hold," he said, and shook his head. "There is a woman in the village who mends sails. Go to her, and say that I have sent you."

So we went up the hill to the village. The houses were small and white, and the doors stood open. A girl sat on a step with a cat in her lap. She told us the way without looking up, and we found the woman at her table, with a needle in her hand and the sail of another boat before her.
She asked us where we came from, and where we wished to go, and what we had paid for our boat. When she had heard everything she laughed, and said that the man who had sold it to us was her cousin, and that he had never told the truth in his life.
"""

DOCUMENTS = {
    "prose": PASSAGE.encode(),
    "one byte": b"a",
    "line ends of DOS": b"The harbor was quiet.\r\nHe went home.\r\n",
    "not UTF-8": b"The harbor \xff\xfe\x80 was quiet.\x00",
    "other scripts": "Das M\u00e4dchen a\u00df Br\u00f6tchen. \u4eca\u65e5\u306f\u4e16\u754c \U0001f600".encode(),
}

EXAMPLES = [
    "An old man stood on the quay with a lantern in his hand, and the boy took him by the hand",
    "He shook his head and said that he did not know what to do, and she said that she did not know what to do",
    "She opened the door and went into the room",
    "He had never seen the sea, and he asked his father to take him to the sea",
    "He put his hand on her shoulder and looked into her eyes",
    "They sat by the fire and talked until late in the night",
    "The king had three sons, and the youngest of them was the most beautiful of the three sons",
    "\u201cI do not know,\u201d he said, and shook his head",
    "She went up the hill to the old caf\u00e9",
    "The man came back the next day",
    "It was so dark that we could see nothing at all",
    "He said that he would come back again",
]

WINDOW = 70
EMBEDDED = "The harbor was quiet."


def main():
    sys.path.insert(0, DEMO)
    import evaluate

    model = evaluate.Model(os.path.join(DEMO, "rwkv7_demo.safetensors"))
    tokenizer = evaluate.Tokenizer(os.path.join(DEMO, "rwkv7_demo.vocab.txt"))

    def logprobs(ids):
        """[T, V] after id 0 and each of ids but the last."""
        state, rows = model.zero_state(1), []
        for i in [0] + ids[:-1]:
            logits = model.step(np.array([i]), state)[0].astype(np.float64)
            rows.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
        return np.array(rows)

    golden = {"documents": [], "lambada": [], "context": {}, "embed": {}}
    for name, data in DOCUMENTS.items():
        ids = tokenizer.encode(data)
        nats = -logprobs(ids)[np.arange(len(ids)), ids].sum()
        golden["documents"].append({"name": name, "hex": data.hex(), "tokens": len(ids), "nats": nats})

    for text in EXAMPLES:
        context, word = text.rsplit(" ", 1)
        context, target = tokenizer.encode(context.encode()), tokenizer.encode((" " + word).encode())
        rows = logprobs(context + target)[len(context):]
        golden["lambada"].append({
            "text": text,
            "correct": bool((rows.argmax(-1) == target).all()),
            "nats": -rows[np.arange(len(target)), target].sum()
        })

    ids = tokenizer.encode(PASSAGE.encode())
    windows = [ids[i:i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    nats = np.array([-logprobs(w)[np.arange(WINDOW), w] for w in windows])
    means = np.stack([nats[:, :64].mean(1), nats[:, 64:].mean(1)])
    error = np.sqrt(len(windows))
    golden["context"] = {
        "text": PASSAGE,
        "window_tokens": WINDOW,
        "windows": len(windows),
        "nats_per_token": list(means.mean(1)),
        "standard_error": list(means.std(1, ddof=1) / error),
        "rise_nats": max(0, (means[1] - means[0]).mean()),
        "rise_standard_error": (means[1] - means[0]).std(ddof=1) / error
    }

    model.weights["head.weight"] = np.eye(model.heads * model.head,
                                          dtype=np.float32)  # step() gives the hidden state now.
    state, hidden = model.zero_state(1), []
    for i in tokenizer.encode(EMBEDDED.encode()):
        hidden.append(model.step(np.array([i]), state)[0])
    matrix = state[-1][1][0].reshape(-1)
    golden["embed"] = {
        "text": EMBEDDED,
        "tokens": len(hidden),
        "hidden-last": [float("%.7g" % x) for x in hidden[-1]],
        "hidden-mean": [float("%.7g" % x) for x in np.mean(hidden, 0, np.float64)],
        "state_size": matrix.size,
        "state_every_97th": [float("%.7g" % x) for x in matrix[::97]],
        "state_norm": float(np.sqrt(np.square(matrix.astype(np.float64)).sum()))
    }
    with open(os.path.join(HERE, "eval.json"), "w") as f:
        json.dump(golden, f, indent=1, default=float)
        f.write("\n")


if __name__ == "__main__":
    main()
