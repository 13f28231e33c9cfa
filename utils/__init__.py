"""What the scripts share: one room per question (see docs/architecture.md)."""

__version__ = "0.1.0"
