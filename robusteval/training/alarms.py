"""What a training history gives reason to warn of."""

from __future__ import annotations

from collections.abc import Sequence

from robusteval.training.checkpoint import Row

FALL = 0.2
"""A fall of the validation PGD accuracy by this much is an alarm, as in fast adversarial training's early stopping
(Wong et al. 2020, arXiv 2001.03994); half as much is, where the accuracy is halved."""


def alarms(history: Sequence[Row]) -> list[str]:
    """Return a sentence for the first collapse of each kind in ``history``.

    Catastrophic overfitting is a collapse under PGD that single-step FGSM does not see.
    """
    found: dict[str, str] = {}
    for position, row in enumerate(history[1:], 1):
        best = max(history[:position], key=lambda earlier: earlier["val_pgd"])
        fall = best["val_pgd"] - row["val_pgd"]
        if not (fall > FALL or (fall > FALL / 2 and row["val_pgd"] < best["val_pgd"] / 2)):
            continue
        unseen = best["val_fgsm"] - row["val_fgsm"] < fall / 2
        kind = "catastrophic overfitting" if unseen else "robust accuracy collapsed"
        found.setdefault(
            kind,
            f"{kind} in epoch {row['epoch']:.0f}: validation PGD accuracy fell from {best['val_pgd']:.1%} "
            f"(epoch {best['epoch']:.0f}) to {row['val_pgd']:.1%}, FGSM accuracy went from {best['val_fgsm']:.1%} "
            f"to {row['val_fgsm']:.1%}",
        )
    return list(found.values())
