"""The report of a run: one self-contained HTML file."""

from unime_ray.report.build import run_report

__all__ = ["run_report"]
