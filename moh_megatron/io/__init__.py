"""Files of any kind: folders that appear at once, JSON, hashes, what a user can do where the file system refuses."""
