"""Files and folders of any kind, what the console shows, and what a user can do where the file system refuses."""
