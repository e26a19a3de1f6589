"""Documents on disk or on the hub -> fixed-length training rows."""
