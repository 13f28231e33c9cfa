"""What the scripts share: one room per question (see docs/architecture.md)."""
