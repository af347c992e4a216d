"""What a run came to: its loss as a picture, and its bits per byte beside those of xz on the same bytes."""

import json
import lzma
from pathlib import Path

import numpy as np

from trainer import metrics


def last_step(run: Path) -> int:
    """The last step that the run has written down, 0 before the first; its last line may be half written."""
    file = run / metrics.METRICS
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def held_out(prefix: Path, tokenizer: Path) -> list[bytes]:
    """The texts of a dataset, from its tokens, whose tokenizer loses nothing."""
    from trainer.data.indexed import read_index
    from trainer.data.tokenizer import Tokenizer

    index, pieces = read_index(str(prefix)), Tokenizer.load(tokenizer)
    data = Path(f"{prefix}.bin").read_bytes()
    texts, start = [], 0
    for length in index.lengths:
        end = start + int(length) * index.dtype.itemsize
        # The last token is the end of the document.
        texts.append(pieces.decode(np.frombuffer(data[start:end], index.dtype)[:-1].tolist()).encode())
        start = end
    return texts


def comparison(bits_per_byte: float, texts: list[bytes]) -> str:
    """A line for the model and one for xz -9, which packs all texts together."""
    size = sum(map(len, texts))
    xz = 8 * len(lzma.compress(b"".join(texts), preset=9)) / size
    verdict = "less" if bits_per_byte < xz else "more"
    return (
        f"the model: {bits_per_byte:.3f} bits per byte of {size:,} bytes in {len(texts)} files it has not seen\n"
        f"xz -9:     {xz:.3f} bits per byte of the same; the model needs {abs(1 - bits_per_byte / xz):.0%} {verdict}"
    )


def curve(run: Path, file: Path) -> None:
    """Draw the loss of training and of held-out data over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = metrics.read(run)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("train/loss", "-"), ("valid/loss", "o-")):
        points = [record for record in records if name in record]
        axes.plot([point["step"] for point in points], [point[name] for point in points], style, label=name)
    axes.set(xlabel="step", ylabel="nats per token", title=str(run))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
