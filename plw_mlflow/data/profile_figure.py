"""The figure of a length profile."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from plw_mlflow.data.profile import Profile, weights_text
from plw_mlflow.drawing import COLOURS, CURVE_BLUE, DASHED, SURE_RED, clear_frame, new_figure, plain, png, tick_labels
from plw_mlflow.transforms import EXPONENT, make_transform


def draw_profile(profile: Profile) -> bytes:
    """A PNG of a length profile: how long the records are, and what part of the loss weight lies on their prompts."""
    figure = new_figure(11, 5)
    left, right = figure.subplots(1, 2, width_ratios=(4, 3))
    for axes in (left, right):
        clear_frame(axes)
        axes.set_ylim(0, 1)
    _draw_lengths(left, profile)
    _draw_prompt_shares(right, profile)
    figure.legend(loc="outside lower left", ncols=3, fontsize=8.5, frameon=False)
    ratio = profile.generation_ratio
    heading = plain(profile.name, 60) + ("" if ratio is None else f"   generation ratio {ratio:.3g}")
    figure.suptitle(heading, x=0.02, ha="left", fontsize=13, fontweight="bold")
    return png(figure)


def _draw_lengths(axes: Axes, profile: Profile) -> None:
    """For each part of a record, the share of the records in which it is no longer than so many tokens."""
    lengths = {f"{name}, bare": profile.lengths[name] for name in ("instruction", "input", "completion")}
    lengths["whole example, with template"] = profile.lengths_with_template["example"]
    colours = [COLOURS[1], COLOURS[0], COLOURS[2], "black"]
    for (name, length), line, colour in zip(lengths.items(), ("--", ":", "-", "-"), colours, strict=True):
        tokens, shares = list(length.quantiles.values()), [float(share) for share in length.quantiles]
        label = f"{name}: mean {length.mean:.1f}"
        axes.step(tokens, shares, line, where="post", color=colour, linewidth=2, label=label)
    cut = f"max-tokens {profile.max_tokens}: {profile.longer_than_max_tokens:.1%} are longer"
    axes.axvline(profile.max_tokens, color=SURE_RED, linewidth=1.4, linestyle=DASHED, label=cut)
    axes.set_xscale("symlog", linthresh=1, linscale=0.5, base=4)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of the records that are no longer")
    axes.set_title("Lengths", loc="left", fontsize=11)


def _draw_prompt_shares(axes: Axes, profile: Profile) -> None:
    """The part of the loss weight that lies on prompts, by PLW."""
    plws = [float(plw) for plw in profile.effective_prompt_share]
    shares = np.array(list(profile.effective_prompt_share.values()), float)  # None, an undefined one, as NaN
    axes.plot(np.array(plws) ** EXPONENT, shares, "-o", color=CURVE_BLUE, linewidth=2, markersize=5)
    ticks = tick_labels(make_transform("w_p", plws), axis_width=0.6)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(f"prompt loss weight (PLW), spaced as w_p = PLW^{EXPONENT}")
    axes.set_ylabel("prompts' share of the loss weight")
    axes.set_title(f"What a PLW leaves to the prompts{weights_text(profile)}", loc="left", fontsize=11)
