"""The report of a study: a table or figure of the paper beside ours."""
