/* The floor: a server that does nothing but receive and send. To each line it answers the same line.
 *
 * It takes as many calls to the kernel as a server must: what it reaches is what the machine allows, and what the
 * load generator can ask for. It ends when its input ends.
 */
#include "load.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static char answers[DEPTH_MAX * CARD_BYTES];
static size_t answer_length;

static int listen_somewhere(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 1024) < 0 ||
        getsockname(fd, (struct sockaddr *)&address, &length) < 0)
        die("the floor cannot listen");
    printf("listening tcp://127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void answer(int fd) {
    char input[INPUT_BYTES];
    ssize_t length = recv(fd, input, sizeof input, MSG_DONTWAIT);
    size_t lines = 0;
    if (length <= 0) {
        close(fd);
        return;
    }
    for (const char *at = input; (at = memchr(at, '\n', (size_t)(input + length - at))) != NULL; at++)
        lines++;
    while (lines > 0) {
        size_t some = lines < DEPTH_MAX ? lines : DEPTH_MAX;
        ssize_t sent = send(fd, answers, some * answer_length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent != (ssize_t)(some * answer_length)) {
            close(fd);
            return;
        }
        lines -= some;
    }
}

static void watch(int epoll, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

int main(void) {
    static const struct asked nothing;
    struct protocol floor = {0};
    struct epoll_event events[256];
    int epoll = epoll_create1(0), listener = listen_somewhere(), on = 1;
    make_floor(&floor);
    answer_length = card_fill(&floor.reply[READ], &nothing, answers);
    for (size_t n = 1; n < DEPTH_MAX; n++)
        memcpy(answers + n * answer_length, answers, answer_length);
    watch(epoll, listener);
    watch(epoll, STDIN_FILENO);
    for (;;) {
        int count = epoll_wait(epoll, events, 256, -1);
        for (int n = 0; n < count; n++) {
            int fd = events[n].data.fd;
            if (fd == STDIN_FILENO)
                return 0;
            if (fd != listener) {
                answer(fd);
                continue;
            }
            fd = accept(listener, NULL, NULL);
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            watch(epoll, fd);
        }
    }
}
