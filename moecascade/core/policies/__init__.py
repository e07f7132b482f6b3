"""This project's policies of one file each: `off`, `static:K`, the paper's `cascade`."""
