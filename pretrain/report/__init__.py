"""The report: arms compared with a baseline, over seeds, on one page."""
