#!/bin/bash
# Unpacks the text-like files of Debian packages, the first step of making the corpus.
#   tests/reference/unpack_packages.sh DEBS SOURCES      DEBS: folder of *.deb (listed in tests/fixtures/README.md)
set -e
for package in "$1"/*.deb; do
  name=$(dpkg-deb -f "$package" Package)
  mkdir -p "$2/$name"
  dpkg-deb --fsys-tarfile "$package" | tar -x -C "$2/$name" --wildcards --no-anchored '*.html' '*.htm' '*.html.gz' '*.txt' '*.txt.gz' \
    '*.md' 'copyright' '*/man/*.gz' 'fortunes/*' '*.adoc' 2>/dev/null || true        # tar complains where a pattern matches nothing
  echo "$name: $(find "$2/$name" -type f | wc -l) files"
done
