"""What a pruning is asked to do; no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from utils.darknet.data_file import DataConfig
from utils.model_files import ModelFiles
from utils.pruning.policy import ChannelPolicy


@dataclass(frozen=True)
class PruneRequest:
    """What a pruning script was asked for, checked as far as it can be without torch."""

    strategy: str
    files: ModelFiles
    policy: ChannelPolicy
    data: DataConfig | None
    args: argparse.Namespace

    @property
    def project(self) -> Path:
        """Folder of the run directory."""
        return Path(self.args.project)
