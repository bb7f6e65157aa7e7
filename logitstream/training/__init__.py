"""The student's trainer and the stream of targets that feeds it."""
