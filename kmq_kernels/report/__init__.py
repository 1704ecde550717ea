"""The tables and the page of what was run."""

from .page import page, write_report
from .tables import ReportError, Summary, Value, collect, markdown, quality, summaries

__all__ = ["ReportError", "Summary", "Value", "collect", "markdown", "page", "quality", "summaries", "write_report"]
