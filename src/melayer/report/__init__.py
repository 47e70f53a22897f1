"""Results to one self-contained HTML page and one JSON file."""

from melayer.report.page import (
    check_writable,
    write_contrast_report,
    write_eval_report,
    write_quant_report,
    write_report,
    write_scan_report,
    write_tune_report,
)

__all__ = [
    "check_writable",
    "write_contrast_report",
    "write_eval_report",
    "write_quant_report",
    "write_report",
    "write_scan_report",
    "write_tune_report",
]
