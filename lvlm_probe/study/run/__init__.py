"""Running a study: its units of work, the engines that do them, and their cost."""
