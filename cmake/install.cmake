# Installed with the release of the library; see below.
