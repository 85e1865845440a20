/* The bare sequence that makes a file whole and durable, with nothing around it: what a commit cannot be faster than.
 *
 *     bare FILE --warm S --seconds S
 *
 * A new file with the bytes of FILE is written beside it and synced, takes FILE's name, and the folder is synced; over
 * and over, in one thread. At the end one line of JSON, as of `load`.
 */
#include "load.h"

#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char *bytes;
static size_t length;
static char path[4096], beside[4096 + 8], folder[4096];

static void read_file(void) {
    FILE *file = fopen(path, "r");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0)
        die("cannot read %s", path);
    length = (size_t)ftell(file);
    bytes = malloc(length + 1);
    rewind(file);
    if (fread(bytes, 1, length, file) != length)
        die("cannot read %s", path);
    fclose(file);
}

static void commit(void) {
    int file = open(beside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0 || write(file, bytes, length) != (ssize_t)length || fsync(file) < 0 || close(file) < 0 ||
        rename(beside, path) < 0)
        die("cannot write %s", path);
    int above = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (above < 0 || fsync(above) < 0 || close(above) < 0)
        die("cannot sync %s", folder);
}

int main(int count, char **words) {
    static const struct option known[] = {{"warm", 1, 0, 'w'}, {"seconds", 1, 0, 's'}, {0, 0, 0, 0}};
    static struct histogram histogram;
    double warm_s = 0, seconds = 1;
    for (int letter; (letter = getopt_long(count, words, "", known, NULL)) != -1;)
        *(letter == 'w' ? &warm_s : &seconds) = strtod(optarg, NULL);
    if (optind != count - 1 || strlen(words[optind]) >= sizeof path)
        die("name one file");
    strcpy(path, words[optind]);
    snprintf(beside, sizeof beside, "%s.new", path);
    strcpy(folder, path);
    *strrchr(folder, '/') = 0;
    read_file();
    uint64_t begin = now_ns() + (uint64_t)(warm_s * 1e9), end = begin + (uint64_t)(seconds * 1e9);
    for (uint64_t before = now_ns(), after; before < end; before = after) {
        commit();
        after = now_ns();
        if (before >= begin && after < end)
            histogram_add(&histogram, after - before);
    }
    printf("{\"replies\": %llu, \"a_second\": %.1f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"bytes\": %zu}\n",
        (unsigned long long)histogram.count, (double)histogram.count / seconds, histogram_us(&histogram, 0.5),
        histogram_us(&histogram, 0.99), length);
    return 0;
}
