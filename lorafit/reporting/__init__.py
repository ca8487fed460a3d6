"""What `lorafit.report` is made of: the runs that are read, the choice between them, charts, the page."""
