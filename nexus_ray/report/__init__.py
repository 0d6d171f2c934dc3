"""Pages and tables made from run records; reads the record and nothing else, so any run can be reported anywhere."""
