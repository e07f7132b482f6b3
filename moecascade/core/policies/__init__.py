"""This project's policies of one file each: `static:K`, with `off`, and the paper's `cascade`."""
