"""From the records of a run to tables, figures and a page."""
