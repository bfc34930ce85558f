"""From a photo to a typed disparity map, to pictures and to files."""
