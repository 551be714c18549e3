"""What is made of the suites' rows: the claims and their verdicts, tables, figures and the page."""
