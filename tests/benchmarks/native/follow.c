/* Watchers: how long after a change was sent those who watch the name have it.
 *
 *     follow PROTOCOL --port N [--watchers N] [--warm N] [--changes N] [--server PID]
 *
 * Each watcher has a connection of its own, and so has the one who writes. A change is sent once all have the one
 * before. Time runs from just before the change is sent until the new value has been received; watchers are read in
 * the order in which their data comes. `p50_us` and `p99_us` are of all watchers and changes, `last_p50_us` and
 * `last_p99_us` of the last watcher to have each change.
 */
#include "load.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

#define WATCHERS_MAX 9000

static struct protocol *protocol;
static struct connection *watchers, writer;
static uint32_t watcher_count = 1, changes = 300, warm = 20;
static int port, epoll;
static struct histogram all, last;
static struct card news;

static void subscribe(uint32_t number) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.u32 = number}};
    struct connection *watcher = &watchers[number];
    const struct asked self = {.connection = number};
    char wanted[CARD_BYTES];
    watcher->number = number;
    dial(watcher, protocol, port);
    say(watcher, wanted, card_fill(&protocol->watch, &self, wanted));
    watcher->input_length = 0;
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, watcher->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

/* Whether this watcher has the news now. What it got before is of no interest; what may be its beginning is kept. */
static int hears(struct connection *watcher, const char *wanted) {
    ssize_t length = recv(watcher->fd, watcher->input + watcher->input_length, INPUT_BYTES - watcher->input_length,
        MSG_DONTWAIT);
    if (length <= 0)
        die("watcher %u was closed", watcher->number);
    watcher->input_length += (size_t)length;
    int heard = memmem(watcher->input, watcher->input_length, wanted, news.length) != NULL;
    size_t kept = heard ? 0 : watcher->input_length < news.length ? watcher->input_length : news.length - 1;
    memmove(watcher->input, watcher->input + watcher->input_length - kept, kept);
    watcher->input_length = kept;
    return heard;
}

/* Take all that comes until nothing has come for a while. */
static void settle(void) {
    struct epoll_event events[256];
    for (int found; (found = epoll_wait(epoll, events, 256, 300)) > 0;)
        for (int n = 0; n < found; n++)
            hears(&watchers[events[n].data.u32], news.bytes);
}

/* The writer's replies are of no interest: that the watchers have the change says that it was made. */
static void forget_replies(void) {
    static const struct timespec moment = {.tv_nsec = 1000000};
    static char replies[INPUT_BYTES];
    nanosleep(&moment, NULL);
    while (recv(writer.fd, replies, sizeof replies, MSG_DONTWAIT) > 0)
        ;
}

/* Send one change and wait until all have it; how long that took. */
static uint64_t change(uint32_t number, int counts) {
    const struct asked asked = {.count = number, .tag = number, .connection = writer.number};
    struct epoll_event events[256];
    char wanted[CARD_BYTES], request[CARD_BYTES];
    size_t length = card_fill(&protocol->publish, &asked, request);
    card_fill(&news, &asked, wanted);
    uint64_t began = now_ns(), now = began;
    say(&writer, request, length);
    for (uint32_t heard = 0; heard < watcher_count;) {
        int found = epoll_wait(epoll, events, 256, 10000);
        if (found == 0)
            die("%u of %u watchers never heard of change %u", watcher_count - heard, watcher_count, number);
        for (int n = 0; n < found; n++) {
            struct connection *watcher = &watchers[events[n].data.u32];
            if (!hears(watcher, wanted) || watcher->turn == number)
                continue;
            watcher->turn = number;
            now = now_ns();
            heard++;
            if (counts)
                histogram_add(&all, now - began);
        }
    }
    if (counts)
        histogram_add(&last, now - began);
    forget_replies();
    return now - began;
}

static double own_s(void) {
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    return (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) +
           (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6;
}

static void read_options(int count, char **words) {
    static const struct option known[] = {{"port", 1, 0, 'p'}, {"watchers", 1, 0, 'w'}, {"warm", 1, 0, 'W'},
        {"changes", 1, 0, 'c'}, {"server", 1, 0, 's'}, {0, 0, 0, 0}};
    for (int letter; (letter = getopt_long(count, words, "", known, NULL)) != -1;) {
        uint32_t number = optarg ? (uint32_t)strtoul(optarg, NULL, 10) : 0;
        switch (letter) {
        case 'p': port = (int)number; break;
        case 'w': watcher_count = number; break;
        case 'W': warm = number; break;
        case 'c': changes = number; break;
        case 's': break;
        default: exit(2);
        }
    }
    if (optind != count - 1 || (protocol = protocol_named(words[optind])) == NULL || protocol->watch.length == 0)
        die("name one protocol that has watchers");
    if (watcher_count < 1 || watcher_count > WATCHERS_MAX)
        die("1 to %d watchers", WATCHERS_MAX);
}

int main(int count, char **words) {
    read_options(count, words);
    card_text(&news, INSTANCE);
    epoll = epoll_create1(0);
    watchers = calloc(watcher_count, sizeof *watchers);
    for (uint32_t n = 0; n < watcher_count; n++)
        subscribe(n);
    writer.number = watcher_count;
    dial(&writer, protocol, port);
    settle();
    for (uint32_t n = 1; n <= warm; n++)
        change(n, 0);
    double used_s = -own_s(), waited_s = 0;
    for (uint32_t n = warm + 1; n <= warm + changes; n++)
        waited_s += (double)change(n, 1) / 1e9;
    used_s += own_s();
    printf("{\"replies\": %llu, \"p50_us\": %.2f, \"p99_us\": %.2f, \"last_p50_us\": %.2f, \"last_p99_us\": %.2f, "
           "\"load_share\": %.3f}\n",
        (unsigned long long)all.count, histogram_us(&all, 0.5), histogram_us(&all, 0.99), histogram_us(&last, 0.5),
        histogram_us(&last, 0.99), used_s / waited_s);
    return 0;
}
