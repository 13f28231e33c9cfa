"""The report of a compression: run directories as one page, and the same as Markdown and JSON."""

from utils.report.journey.report import write_report

__all__ = ["write_report"]
