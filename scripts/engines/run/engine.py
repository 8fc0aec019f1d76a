"""What the runners of engines share. A runner is called as `python RUNNER.py FOLDER REQUEST RESULT [OPTION=VALUE ...]`.

REQUEST is JSON: {"prompts": [[id, ...], ...], "windows": [[id, ...], ...], "new": N}. RESULT becomes
{"continuations": [[id] * N, ...], "losses": [[nats, ...], ...], "cache": [values per token and layer] or null, "note": text}.
Decoding is greedy. An engine that takes text only leaves "losses" empty and compares text (its runner says how).
"""

import json
import sys
from pathlib import Path


def main(run):
    folder, request, result, *options = sys.argv[1:]
    request = json.loads(Path(request).read_text())
    answer = run(Path(folder), request["prompts"], request["windows"], request["new"], dict(o.split("=", 1) for o in options))
    Path(result).write_text(json.dumps({"cache": None, "note": ""} | answer))


def losses(logits, window):
    """Loss of each token of a window but the first, nats; `logits` is a float array [tokens, vocabulary]."""
    import numpy as np

    x = np.asarray(logits, dtype=np.float64)[:-1]
    top = x.max(-1, keepdims=True)
    total = np.log(np.exp(x - top).sum(-1)) + top[:, 0]
    return (total - x[np.arange(len(window) - 1), window[1:]]).tolist()
