"""What is the same for all four methods, and teaches nothing about any: data, backbones, metrics, the run, the report.

Dependencies point one way: a script imports `common` and `kernels`; neither of these knows any method. (papers.py and
tables.py know the papers' numbers and the scripts' command lines, no more.)
"""


class UsageError(ValueError):
    """A mistake that the user can mend: a wrong path, option, file or image.

    The message is one line that names the file or option and says what to do. The scripts print it on stderr and end
    with exit status 2; Python callers can catch it as a `ValueError`.
    """
