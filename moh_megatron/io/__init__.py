"""Files and folders of any kind, what the console shows, and what a user can do about errors of the file system."""
