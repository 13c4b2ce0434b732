"""The course: what is read, run and solved beside the four scripts. It begins with docs/syllabus.md."""
