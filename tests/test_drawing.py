"""What all figures share: tick labels apart from each other, names shown literally, well-formed files."""

import xml.etree.ElementTree as ET

import numpy as np
from matplotlib.figure import Figure

from plw_mlflow import drawing
from plw_mlflow.transforms import make_transform

PLWS = [0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1]


def test_tick_labels_keep_their_distance():
    labels = drawing.tick_labels(make_transform("w_p", PLWS))
    places = list(labels)
    assert labels[0] == "0"
    assert labels[1] == "1"
    assert "0.0022" not in labels.values()  # it would touch 0.0005
    assert np.diff(places).min() > 0.06


def test_control_characters_make_no_figure_ill_formed():
    figure = Figure()
    figure.suptitle("a\x00\x1b[2J\ufffe")
    figure.gca().set_xlabel(drawing.plain("b\x07"), gid="\x01")
    assert ET.fromstring(drawing.svg(figure)).tag.endswith("svg")
    assert drawing.plain("b\x07") == "b\\x07"
