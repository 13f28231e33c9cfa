"""The blocks of a Darknet network as frozen dataclasses, each named as its cfg section; `SECTIONS` has them all."""

from utils.darknet.blocks.block import ACTIVATIONS, Block, Net, Network, Shape, words
from utils.darknet.blocks.convolutional import BN_EPSILON, Convolutional, Depthwise
from utils.darknet.blocks.gates import Sam, ScaleChannels, Se
from utils.darknet.blocks.resampling import Avgpool, Dropout, Maxpool, Reorg, Upsample
from utils.darknet.blocks.route import Route, RouteLhalf
from utils.darknet.blocks.shortcut import SHORTCUT_EPSILON, Shortcut
from utils.darknet.blocks.yolo import Yolo

SECTIONS = {
    kind.SECTION: kind
    for kind in (
        Convolutional,
        Depthwise,
        Se,
        Maxpool,
        Avgpool,
        Upsample,
        Route,
        RouteLhalf,
        Shortcut,
        ScaleChannels,
        Sam,
        Dropout,
        Reorg,
        Yolo,
    )
}
ALIASES = {"conv": "convolutional", "max": "maxpool", "avg": "avgpool"}
"""Short names Darknet takes, too."""
UNSUPPORTED = words(
    "Gaussian_yolo activation batchnorm conn connected contrastive conv_lstm cost crnn crop detection empty gru "
    "history implicit local local_avg local_avgpool lrn lstm normalization region reorg3d rnn silence soft softmax"
)
"""Sections Darknet knows and this suite does not."""
